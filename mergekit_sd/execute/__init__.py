"""From a plan to files, in one streaming pass per output."""
