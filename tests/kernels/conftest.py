"""Inputs that Hypothesis draws are others in each run; what failed is printed with what draws it again."""

from hypothesis import settings

# Nothing is kept between runs, so that a failure prints its seed, which an example from a database would not.
settings.register_profile("kernels", deadline=None, print_blob=True, database=None)
settings.load_profile("kernels")
