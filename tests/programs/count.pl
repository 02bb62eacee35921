# Counts, after it has done what it is told in Perl: count.pl CODE
eval $ARGV[0];
die $@ if $@;
while (1) {
    $n++;
    open(my $file, '>', 'count.new') or die;
    print $file $n;
    close $file;
    rename 'count.new', 'count';
    select(undef, undef, undef, 0.003);
}
