"""What a teacher says of a data set, computed once and kept beside its shards."""
