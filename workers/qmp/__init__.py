"""QMP, the control protocol of QEMU: wire, schema, server, and the commands by subject.

wire      bytes in, messages out; messages in, bytes out                 pure
schema    what a command takes; checks it, describes it                  pure
vocabulary   the commands, enumerations and events that we speak         pure data
server    sockets, clients, negotiation, events
"""
