"""A small --user-dir for the tests of ext_common.compat: a linear regression on made-up data."""

from ext_common import compat

compat.apply()

from . import toy  # noqa: E402, F401
