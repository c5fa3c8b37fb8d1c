"""A filter of system calls: an allow list for a program that computes.

It needs no rights. Allowed is what Python uses to compute, to read files and to write into a
folder. Not among it: sockets, programs, processes, threads, signals to others, other processes'
memory and limits, namespaces, owners and modes of files. Such a call fails with EPERM. Numbers are
the kernel's: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; the
language of filters is Documentation/networking/filter.rst's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

# Per call: its name, its number on x86-64 and on arm64, "-" where that has no such call. What names
# of files may be opened, made or removed is Landlock's decision; a pair of sockets is connected to
# nothing but itself.
_TABLE = """
# files that are open already
read 0 63, write 1 64, close 3 57, fstat 5 80, lseek 8 62, pread64 17 67, pwrite64 18 68,
readv 19 65, writev 20 66, preadv 295 69, pwritev 296 70, dup 32 23, dup2 33 -, dup3 292 24,
fsync 74 82, fdatasync 75 83, ftruncate 77 46, fallocate 285 47, getdents64 217 61, flock 73 32,
fadvise64 221 223, sendfile 40 71, copy_file_range 326 285, fstatfs 138 44
# names of files; what may be opened, made or removed is Landlock's decision
stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, statfs 137 43, access 21 -,
faccessat 269 48, faccessat2 439 439, getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -,
renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -, link 86 -,
linkat 265 37, unlink 87 -, unlinkat 263 35, symlink 88 -, symlinkat 266 36, readlink 89 -,
readlinkat 267 78, umask 95 166
# memory
mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216, msync 26 227,
madvise 28 233
# pipes and waiting; a pair of sockets is connected to nothing but itself
pipe 22 -, pipe2 293 59, socketpair 53 199, recvfrom 45 207, shutdown 48 210, getsockname 51 204,
getpeername 52 205, select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, epoll_create1 291 20,
epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19, pause 34 -, futex 202 98
# time
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114,
gettimeofday 96 169, time 201 -, times 100 153, getitimer 36 102, setitimer 38 103, alarm 37 -
# signals within the process
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132,
rt_sigpending 127 136, rt_sigtimedwait 128 137, restart_syscall 219 128
# about the process and the machine
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176,
getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150, getpgrp 111 -,
getpgid 121 155, getsid 124 156, uname 63 160, getrlimit 97 163, getrusage 98 165,
sysinfo 99 179, sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, getrandom 318 278
# a thread's own, and the end
set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96, rseq 334 293,
arch_prctl 158 -, membarrier 324 283, exit 60 93, exit_group 231 94
"""
_ALLOWED = [
    call.split()
    for line in _TABLE.splitlines()
    if not line.startswith("#")
    for call in line.strip(" ,").split(",")
    if call
]
_OPENAT, _FCNTL, _IOCTL = (257, 56), (72, 25), (16, 29)
_KILL, _TGKILL, _PRLIMIT, _SENDTO = (62, 129), (234, 131), (302, 261), (44, 206)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# F_SETOWN and F_SETSIG are not among these: with them the kernel sends a signal to any process
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # F_DUPFD to F_SETLKW, F_DUPFD_CLOEXEC
# TCGETS (is it a terminal?), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_O_TRUNC, _O_ACCMODE = 0x200, 0x3
_LOAD, _EQUALS, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_ALLOW, _KILL_PROCESS, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_INSTRUCTION = struct.Struct("=HBBI")
_Instruction = tuple[int, int, int, int]  # code, where to jump if true and if false, value


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def install_filter(libc: ctypes.CDLL) -> bool:
    """Filter this process's system calls for ever; whether the kernel does that."""
    if platform.machine() not in _ARCHITECTURES:
        return False
    column, architecture = _ARCHITECTURES[platform.machine()]
    code = b"".join(_INSTRUCTION.pack(*one) for one in _instructions(column, architecture))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // _INSTRUCTION.size, ctypes.addressof(buffer))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return bool(libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) == 0)


def _instructions(column: int, architecture: int) -> list[_Instruction]:
    """The filter for one of the two columns of numbers."""
    code = [(_LOAD, 0, 0, 4), (_EQUALS, 1, 0, architecture), (_RETURN, 0, 0, _KILL_PROCESS)]
    code.append((_LOAD, 0, 0, 0))
    for _, *numbers in _ALLOWED:
        if numbers[column] != "-":
            code += [(_EQUALS, 0, 1, int(numbers[column])), (_RETURN, 0, 0, _ALLOW)]
    own = os.getpid()
    for conditional, block in (
        # without the right to write, O_TRUNC would still empty a file on older kernels
        (_OPENAT, _unless(2, _O_TRUNC | _O_ACCMODE, _O_TRUNC)),
        (_FCNTL, _if_one_of(1, _FCNTL_COMMANDS)),
        (_IOCTL, _if_one_of(1, _IOCTL_COMMANDS)),
        (_KILL, _if_one_of(0, (own,))),
        (_TGKILL, _if_one_of(0, (own,))),
        (_PRLIMIT, _if_one_of(0, (0,))),  # of this process
        # without an address: only to the other end of a pair
        (_SENDTO, [*_skip_if_not_zero(4), *_low_and_allow(4)]),
    ):
        block = [*block, (_RETURN, 0, 0, _FAIL)]
        code += [(_EQUALS, 0, len(block), conditional[column]), *block]
    return [*code, (_RETURN, 0, 0, _FAIL)]


def _argument(index: int, high: bool = False) -> _Instruction:
    """Load half of an argument of the call; both machines store the low half first."""
    return (_LOAD, 0, 0, 16 + 8 * index + (4 if high else 0))


def _if_one_of(index: int, values: tuple[int, ...]) -> list[_Instruction]:
    """Allow if the low half of an argument, a C int, is one of some values."""
    code = [_argument(index)]
    for value in values:
        code += [(_EQUALS, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return code


def _unless(index: int, mask: int, value: int) -> list[_Instruction]:
    """Allow unless some bits of an argument have a value."""
    return [
        _argument(index),
        (_AND, 0, 0, mask),
        (_EQUALS, 1, 0, value),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _skip_if_not_zero(index: int) -> list[_Instruction]:
    """Fail if the high half of an argument is not 0."""
    return [_argument(index, high=True), (_EQUALS, 1, 0, 0), (_RETURN, 0, 0, _FAIL)]


def _low_and_allow(index: int) -> list[_Instruction]:
    return _if_one_of(index, (0,))
