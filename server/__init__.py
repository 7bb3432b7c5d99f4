"""What the coordinator runs. Imports `common`, never `client` or `sites`."""
