# SPDX-License-Identifier: LGPL-2.1-or-later
# Computes until there is a file `enough`, with a timer ticking; says how many rounds it made, and what came of them.
use strict;
use warnings;
use Time::HiRes qw(setitimer ITIMER_REAL);

my ($ticks, $rounds, $value) = (0, 0, 1);

sub work {
    use integer;
    for (1 .. 1000) {
        $value = $value * 6364136223846793005 + 1442695040888963407;
        $rounds++;
    }
}

sub touch {
    open my $file, '>', $_[0] or die "$_[0]: $!";
    close $file;
}

$SIG{ALRM} = sub { $ticks++ };
setitimer(ITIMER_REAL, 0.01, 0.01);
work() until $ticks > 3;
touch('working');
work() until -e 'enough';
my $seen = $ticks;
work() until $ticks > $seen + 3;
printf "%d %u\n", $rounds, $value;
