"""Rules that hold between flags, files and this version; `check` puts them together."""
