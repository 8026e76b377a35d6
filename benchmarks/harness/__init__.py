"""What all benchmark families share: measuring, the machine's ceilings, the record, the command line."""
