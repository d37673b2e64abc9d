"""Shards -> augmented uint8 batches, streamed by Ray Data.

1. order           (seed, epoch) -> the sequence of sample ids of the run
2. dataset         the location of samples; the cache of decoded samples
3. blocks          a block of ids -> samples, decoded, augmented, stacked
   augment, elastic, gpu_augment    random transforms, pure functions of (seed, epoch, sample id)
4. execution, stream    blocks of one rank, in order -> batches
"""
