"""Turns images in other people's formats into array_record files that are read at random.

formats       recognizes the format and plans the import: `folders`, `archives` and `tables`
inspecting    finds what is odd about a record, and whether it is left out
writing       writes parts into shards, resumed part by part, and the report
beam          lets Apache Beam write the parts, on many cores or machines
page          shows data: a contact sheet, sizes, brightness, the words of captions
"""
