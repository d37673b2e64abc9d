"""`download`: LIVECell from its public bucket to a folder for `prepare`.

livecell    which files, and where they are stored
fetch       one file over HTTP, resumed and verified
archive     check and unpack fetched files
"""
