// The file DREAM_FILE as an array of bytes DREAM_NAME.
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

  .section .rodata
  .balign 64
  .globl DREAM_NAME
  .hidden DREAM_NAME
DREAM_NAME:
  .incbin DREAM_FILE
  .globl JOIN(DREAM_NAME, _end)
  .hidden JOIN(DREAM_NAME, _end)
JOIN(DREAM_NAME, _end):
  .byte 0

  .section .note.GNU-stack, "", %progbits
