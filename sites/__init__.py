"""What a hospital's data is: files, checks, institutions, preprocessing. Imports `common` only."""
