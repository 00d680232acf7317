"""What every wing stands on: no model in it, and importing it imports nothing that costs (see doctor)."""

from ext_common import threads

threads.settle_a_command()
