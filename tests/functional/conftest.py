"""Property tests take the time they need: on a busy machine a limit on each example fails at random."""

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
