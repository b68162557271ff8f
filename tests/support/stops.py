"""Runs that are stopped, or disturbed, between two shards."""

from nemoquant.pack import write


def stopped_after(count, patch, action=None):
    """Packer.write that acts, or is interrupted, after some shards."""
    packed, done = write.Packer.write, 0

    def some(*arguments):
        nonlocal done
        done += 1
        if done > count:
            if action is None:
                raise KeyboardInterrupt
            action()
        return packed(*arguments)

    patch.setattr(write.Packer, "write", some)
