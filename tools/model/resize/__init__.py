"""A resize as an explicit-state model of its own (``workers/resize.py``).

``state.py``        sizes, generation, processes; a size is 0 (before) or 1 (after)
``protocol.py``     every step: the coordinator, those that adopt, workers, a handle that attaches
``properties.py``   no worker of the old size copies for a snapshot of the new one; nobody is turned away
``mutations.py``    the protocol with one rule removed, once per rule

What it leaves out, and why it may
----------------------------------
Writers: one that was attached before goes on in the same words of the same pages, so for it nothing happens. Snapshots
are refused beside a resize, and both are the work of the holder of one lock; so the one cut here comes after it.
Workers are worse than real ones: the coordinator's own may be orphans, which it can't wait for, but whose locks it
tests.
"""
