"""Addition and multiplication mod 100 in one network, and the same addition twice: are functions kept apart?"""
