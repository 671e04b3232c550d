# A guest in one boot sector: writes an increasing number to sector FIRST and then to sector SECOND of its first hard
# disk, through the BIOS, for ever.  The second number is never ahead of the first, and at most one behind.
    .code16
    .globl _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    sti
next:
    incl buffer
    movl $FIRST, sector
    call write
    movl $SECOND, sector
    call write
    jmp next

write:                              # int 0x13, extended write: returns when the disk has answered
    movw $0x4300, %ax
    movb $0x80, %dl
    movw $packet, %si
    int $0x13
    jc stop
    ret
stop:                               # an error: write no more
    hlt
    jmp stop

    .balign 4
packet:
    .byte 16, 0
    .word 1                         # sectors
    .word buffer, 0
sector:
    .long 0, 0

    .org 510
    .word 0xaa55
    .set buffer, 0x8000
