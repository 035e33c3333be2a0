"""The screens: each is a view of what the application holds, and starts workers that only post messages."""
