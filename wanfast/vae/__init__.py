"""The VAEs: streaming encode and decode of the Wan 2.1 and Wan 2.2 codecs."""
