"""The text side: cleaning, tokenising and the umT5 encoder."""
