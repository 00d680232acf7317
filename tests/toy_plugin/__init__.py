"""A small --user-dir for the tests of ext_common.compat and engine: a linear regression on made-up data."""

from ext_common import engine

engine.apply()

from . import toy  # noqa: E402, F401
