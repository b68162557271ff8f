"""Faults on purpose: kills, full disks, power cuts, damage, two at once, and files made to harm.

    python -m tests.faults --long             everything, at full length
    python -m tests.faults --only kills       one suite, a seeded sample of its cases

``watch.c`` sees every file event of a process, and can kill it there or let the call fail; ``child.py`` runs
a command of nemoquant in a forked child under it; ``world.py`` has the models and the commands (scenes). A
suite is a module with ``run(world, choose, long)``, which yields a :class:`cases.Case` for each fault.
docs/faults.md has the table of the last long run.
"""
