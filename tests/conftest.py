"""For all tests."""

import tests.support.triton  # noqa: F401 - says how Triton's functions run, before anything imports Triton
