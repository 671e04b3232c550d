"""Two images, one cut: the group cut as an explicit-state model of its own.

``state.py``        the words of both images, the processes, the history
``protocol.py``     every step: writers, the coordinator of both images, an adopter for each
``properties.py``   one instant of both images; all snapshots count or none
``mutations.py``    the protocol with one rule removed, once per rule

What it leaves out, and why it may
----------------------------------
There is no copying here, no cluster byte and no reader of data. A snapshot shows the content of its image at the
moment it was published, or it is broken: that is what the model of one image shows (``tools.model``), for a
coordinator that may be arbitrarily slow between any two of its steps, as this one is when it does the steps of the
other image in between. So here a published entry *is* the content at that moment, kept as history, and the questions
left are whether the two moments are one and whether both count or none.

Nor is anything broken by an input or output error: that is loud, and each image's own affair. Dead writers' slots are
cleared in the model of one image; here nobody but coordinators dies.

An adopter owns one image: two processes may adopt the two images, in any order and at any speed, finish what they
adopted, free the entry and use it for something else before the other one comes. That is the worst case; one process
that adopts both does the same steps in some order.
"""
