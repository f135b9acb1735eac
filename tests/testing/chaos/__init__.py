"""Faults by a seeded schedule against one small run, which must end as if nothing had happened.

schedule   which fault, when: from a seed, and nothing else. Pure
storage    a disk of the run's own that can be full, a checkpoint directory that can be read-only
config     how it is trained
task       what is trained: its data can be slow, and waits where the schedule has still to act
hook       a clock that can jump
world      the run itself: `muster run`, started again whenever it has ended; its processes
deliver    does one fault, and sees that it has happened
judge      whether the causes on record are those of the faults, and the run is the same run
driver     all of it together
"""
