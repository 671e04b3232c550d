"""The protocol as an explicit-state model: every interleaving of a small world, visited.

``state.py``        what a state of the world is: words, processes, history
``world.py``        what the steps of all processes share
``writer.py``       ... and the steps of each: these five files are the protocol
``coordinator.py``
``worker.py``
``reader.py``
``protocol.py``     all steps together, by name; SIGKILL; what is one step, and why
``properties.py``   what must hold in every state, and at the end
``scenarios.py``    the worlds of one image that are searched
``mutations.py``    the protocol with one rule removed, once per rule
``reductions.py``   states that behave alike are visited once
``group/``          two images and one cut, a model of its own
``resize/``         a resize, another one
``worlds.py``       what is searched, of each kind of world
``explorer.py``     breadth-first search, shortest counter-examples
``trace.py``        a counter-example for people

``python -m tools.model`` from the checkout runs all of it.

What the model assumes
----------------------
*Interleaving.* One process does one step at a time and everybody sees its effect
at once: sequential consistency. So the model says nothing about memory orders.
Which loads and stores of the core must be seq_cst, acquire or release for real
machines to behave like this is argued in the comments of the C core, where every
order names its partner line, and tried by the litmus stress of the core's tests.

*Time.* A deadline may pass at any moment, also at once. A process that is slow or
stopped is one that the search does not schedule. So "the coordinator is alive
but stopped" and "a writer is stopped in flight" need no state of their own.

*Size.* What is found is true for the sizes in ``scenarios.py``. More
writers, clusters and cuts are believed, not shown, to add nothing new.
"""
