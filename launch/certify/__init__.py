"""`muster certify`: a run that was interrupted is the same run, proven for a user's own config."""
