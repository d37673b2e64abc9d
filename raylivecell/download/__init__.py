"""`download`: LIVECell from its public bucket to a folder for `prepare`.

livecell    the files and where they are stored
fetch       one file over HTTP, resumed and verified
archive     verify and unpack fetched files
"""
