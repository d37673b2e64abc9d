"""`prepare`: annotated images -> Parquet shards and dataset.json.

1. config          settings, and the rules for each kind of defect
2. prepare         the command: runs steps 3 to 6 on Ray Data
3. sources         find and read COCO files; listing: files of a folder; image_names: match names with files
   paired_source   annotation files per image; pairing: find them by name
   splitting       divide the images of a source without splits; group_names: wells and series in file names
4. defects         find and report defects of images, apply their rules; cell_defects: defects of single cells
5. plan            which images go into which shard
6. draw            images and annotations -> one shard; description: dataset.json
7. shards          read and write the dataset on disk; combined: several datasets as one
"""
