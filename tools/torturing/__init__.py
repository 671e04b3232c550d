"""The torture: everything is done to images at random while everybody is killed and stopped; then the logs decide.

    driver ── nursery ──┬── writer processes        one log each, a new incarnation for each one killed
       │                ├── reader processes        open snapshots from outside
       │                └── coordinator processes   one at a time per image, or for all images of the round;
       │                                            they start the copy workers
       └── watch: reads control segments, never writes them

``plan.py``         what a round is made of; the schedule of kills and stops, a function of the seed
``place.py``        where a round keeps its files
``nursery.py``      forks children from one process that has everything imported, tells of their end
``writer.py``       the role: random writes, zeroes, discards, all stamped and logged
``reader.py``       the role: reads snapshots, and discards parts of them, from any process
``coordinator.py``  the role: cuts, backups, snapshot reads, discards, cancels; an adopted one goes on
``daemon.py``       the same role, played by a daemon and a client of it
``session.py``      the coordinator's process: a role for each of its images, and group cuts over them
``watch.py``        what can be seen from outside: pids, marks, who is reaped, what is left over
``crew.py``         coordinator and writers of an image, kept alive; who hangs
``chair.py``        the coordinator's process, of one image or of all, kept alive
``aims.py``         who is killed or stopped at which moment
``stalls.py``       when the whole machine stood still
``storm.py``        one round: start, rage, let recover, finish, look for leaks
``judge.py``        one copy of an image against the logs: one instant, or why not
``evidence.py``     a finished round: all copies, all promises, from its files alone
``together.py``     group cuts of a finished round: one instant of all images, all members or none
``figures.py``      what is counted, and how it is told

A round lasts some seconds, so logs stay short, and each has another cluster size and other odds.  What it leaves in its
directory is enough to judge it again: ``python tools/torture.py --judge DIRECTORY``.
"""
