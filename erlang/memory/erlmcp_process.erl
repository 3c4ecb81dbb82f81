%%% @doc Spawn options for processes that serve one connection each.
%%%
%%% ```
%%% gen_server:start_link(session, Args, [{hibernate_after, 1000}, {spawn_opt, erlmcp_process:spawn_opts(idle)}]).
%%% spawn_opt(session, loop, [State], [link | erlmcp_process:spawn_opts(bursty)]).
%%% '''
%%%
%%% The module needs neither the native library nor the application.
%%%
%%% == Profiles ==
%%% <ul>
%%% <li>`idle': a request now and then. The least memory, at about twice the time in garbage collections.</li>
%%% <li>`steady': requests all the time. Less than half the time in collections, with about the memory of a process without
%%% options.</li>
%%% <li>`bursty': many requests at once. Short collections while thousands of messages wait. At a steady rate more time in
%%% collections than `steady'.</li>
%%% </ul>
%%%
%%% Measured by `./bench/run --memory' on two cores, OTP 25, with a session whose state takes 1.3 KB and requests of 200
%%% bytes, which it decodes and answers. Bytes and numbers of collections are the same in every run. Times are ratios to a
%%% process without options, the medians of three runs on a busy machine.
%%%
%%% <table border="1">
%%% <tr><th></th><th>no options</th><th>`idle'</th><th>`steady'</th><th>`bursty'</th></tr>
%%% <tr><td>memory of a session in use, bytes</td><td>29,488</td><td>5,784</td><td>34,384</td><td>35,984</td></tr>
%%% <tr><td>collections a second at 1,000 requests a second</td><td>162</td><td>400</td><td>48</td><td>48</td></tr>
%%% <tr><td>time in collections for each request</td><td>1 (0.7-1.5 microseconds)</td><td>1.7-2.7</td><td>0.3-0.5</td><td>0.6-1.0</td></tr>
%%% <tr><td>longest collection while 10,000 requests wait</td><td>1 (1.3-2.0 ms)</td><td>0.7-2.4</td><td>0.6-1.0</td><td>0.03-0.07</td></tr>
%%% <tr><td>memory after these, bytes</td><td>4,720,512</td><td>8,800</td><td>34,384</td><td>36,224</td></tr>
%%% </table>
%%%
%%% == Options ==
%%% <ul>
%%% <li>`fullsweep_after => 0': every collection is a complete one, so that nothing stays in an old heap, which
%%% otherwise makes four fifths of the memory of a session. The heap grows with the state: with states of 1.3 KB to 1.5 MB
%%% a request took no more time in collections than without options, but each collection copies the whole state, and the
%%% longest one grows with it.</li>
%%% <li>`min_heap_size => 4185' (words; 33 KB): the largest heap within about the memory that a process without options
%%% comes to anyway. It is allocated at the start. A hibernating process gives it back, whatever the profile.</li>
%%% <li>`message_queue_data => off_heap': a collection does not copy the messages that wait, so its length does not
%%% depend on their number.</li>
%%% </ul>
%%%
%%% Left out: `min_bin_vheap_size', since twice the default and a tenth of it were within the noise of the default; and
%%% `max_heap_size', since its consequence is the loss of the process, which is not for a default. Add `{max_heap_size, Words}'
%%% to a profile to have a connection killed that outgrows its memory. Only hibernation brings an idle process below the
%%% figures of `idle': to about a kilobyte and its state.
-module(erlmcp_process).

-export([spawn_opts/0, spawn_opts/1]).

-export_type([profile/0, option/0]).

-type profile() :: idle | steady | bursty.
-type option() :: {fullsweep_after, 0} | {min_heap_size, pos_integer()} | {message_queue_data, off_heap}.

%% In words. One of the sizes that a heap may have on OTP 25 to 29; others are rounded up to the next.
-define(HEAP, 4185).


%% @equiv spawn_opts(idle)
-spec spawn_opts() -> [option()].
spawn_opts() ->
    spawn_opts(idle).


%% @doc The options of a profile: for {@link erlang:spawn_opt/4}, the functions of `proc_lib', and the option `spawn_opt' of
%% `gen_server', `gen_statem' and `gen_event'. Constant time. Raises `{bad_option, profile, Value, Expected}'.
-spec spawn_opts(profile()) -> [option()].
spawn_opts(idle) ->
    [{fullsweep_after, 0}];
spawn_opts(steady) ->
    [{fullsweep_after, 0}, {min_heap_size, ?HEAP}];
spawn_opts(bursty) ->
    [{fullsweep_after, 0}, {min_heap_size, ?HEAP}, {message_queue_data, off_heap}];
spawn_opts(Other) ->
    error({bad_option, profile, Other, "idle, steady or bursty"}).
