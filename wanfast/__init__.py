"""wanfast: Wan 2.2 video generation, exact and fast."""
