"""Process groups of a replica."""
