"""What both sides of the federation share. Imports nothing from the other packages."""
