"""Base of all packages: errors, storage, settings, the console. Imports no other package of this project.

errors            errors that the user can fix, printed in one line
addresses         local paths and URIs, parsed and joined
storage           files at a path or URI: read, write, list
settings          the strict pydantic base of all settings
docstrings        docstrings as help texts
console           progress bars and warnings on standard error
process_settings  process-wide settings, changed inside a `with` block
version           the version of this package
signals           SIGTERM ends a command as Ctrl-C does
"""
