"""The terminal UI's place. It may import `mergekit_sd`'s public API and nothing below it.

Installed as `mergekit_sd_tui`, so that it cannot collide with another package's `tui`.
"""
