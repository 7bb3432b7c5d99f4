"""The whole federation on one machine. May import every other package; none imports it."""
