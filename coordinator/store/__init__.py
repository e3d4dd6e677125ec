"""What the coordinator keeps: the database, its records, and blobs."""
