"""What has to hold between flags, files and this version; `check` puts it together."""
