"""The benchmarks: what a write, a cut, a backup, an image and an import cost, beside what else there is.

``hot.py``           a write that finds nothing to copy, against a plain store into a mapping; its system calls
``first_touch.py``   a write that needs one copy, against QEMU's copy-before-write filter
``backup.py``        a full backup of a quiet image, against cp
``drained.py``       how long a cut holds eight busy writers
``nbd.py``           throughput through NBD, against qemu-nbd, QEMU's filter and nbdkit
``memory.py``        shared memory of an image
``imports.py``       what ``import shmcbw`` adds to the start of an interpreter

``plan.py``          what a run was asked for
``figure.py``        a measured figure, what it is compared with, its target
``table.py``         figures for people
``machine.py``       what they were measured on
``place.py``         where: a directory on disk, and tmpfs
``writers.py``       writer processes
``qemu.py``          QEMU's filter, driven in three ways
``servers.py``       NBD servers
``interpreter.py``   interpreters with cached bytecode
``system_calls.py``  the system calls of a run of writes, counted by strace

``python -m tools.bench`` from the checkout runs all of it, in less than eight minutes; ``--quick`` in less than two.

How to read it
--------------
*Rounds in turn.* What is compared is run A B A B, so a machine that gets slower gets slower for both.  Figures are
medians over the rounds, or of all single times of all rounds; p99 and p999 are of all single times.

*Targets.* The last columns judge each figure by the target that the project has set itself, whatever comes out.  No
test asserts a time: a figure says something about the machine it was measured on, and about who else used that
machine.  The load average is printed for this.

*Warm.* Images fit into memory and have been read or written before; what is measured is the way to the page cache,
which is the way that a mapping has.  Only ``cp + sync -d`` and our own backup, which always syncs, wait for a disk.
"""
