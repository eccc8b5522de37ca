"""Images in and out: data sets, files and arrays as square byte images, the network's range, pictures of many."""
