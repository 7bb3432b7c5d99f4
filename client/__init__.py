"""What runs inside a hospital. Imports `common` and `sites`, never `server`."""
