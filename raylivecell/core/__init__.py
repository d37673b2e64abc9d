"""What every package may use: errors, storage, settings, the console. Imports nothing else of this project.

errors            errors that the user can fix, printed in one line
addresses         local paths and URIs, parsed and joined
storage           files at a path or URI: read, write, list
settings          the strict pydantic base of all settings
docstrings        docstrings as help texts
console           progress bars and warnings on standard error
process_settings  process-wide settings, changed for the length of a block
version           the version
signals           SIGTERM ends a command as Ctrl-C does
"""
