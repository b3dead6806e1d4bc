"""What a store and its directory must look like together: an audit, and a repair, of a store that runs or rests."""
