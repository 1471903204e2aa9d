"""An emulated host's shape: a file in; QEMU arguments, libvirt XML or a Vagrantfile's list out.

All pure apart from reading the shipped files: nothing here starts a QEMU or writes a disk.

    model      the nouns               text       JSON <-> model, with `shape` and `checks`
    seats      who sits in which slot  arguments  the outer QEMU's command line
    needs      what QEMU must be able to do       kernel     the host's kernel arguments
    labxml, vagrant  the same lab elsewhere
"""
