"""What every wing stands on: no model in it, and importing it imports nothing (see doctor)."""
