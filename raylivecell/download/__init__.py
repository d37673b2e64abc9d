"""`download`: LIVECell from its public bucket to a folder that `prepare` reads.

livecell           which files, where they are stored
fetch, web         one file over HTTP, resumed and checked
archive            check and unpack what was fetched
"""
