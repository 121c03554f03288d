"""Where the operators meet other libraries, one file a library; nothing is imported until it is asked for."""
