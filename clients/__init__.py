"""Short programs of other people's libraries, with AdaMod in Adam's place."""
