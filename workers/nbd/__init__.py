"""NBD: images and snapshots for every program that speaks it.

``wire`` is the format (bytes in, bytes and requests out; no socket), ``export`` what is served, ``connection`` one
client, ``server`` the processes that serve.  The protocol: https://github.com/NetworkBlockDevice/nbd, doc/proto.md.
"""
