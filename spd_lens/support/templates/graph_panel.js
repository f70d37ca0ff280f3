// What is known of the chosen node; nodes that are ablated and what that does.
theme($('theme'));
function list(title,ids,other){if(!ids.length)return;make(panel,'h3','',`${title} (${ids.length})`);
[...ids].sort((a,b)=>raw[b]-raw[a]).slice(0,25).forEach(i=>{const e=data.edges[i],n=data.nodes[e[other]],b=make(panel,'button','link');
make(b,'span','',whole(n)+placed(n));make(b,'b',e[2]<0?'minus':'plus',`${signed(e[2])} (${e.length>3?`mean |·| ${number(e[3])}, `:''}${number(+(100*shares[i]).toPrecision(2))} %)`);
b.onclick=()=>choose(e[other])})}
function details(){panel.textContent='';if(chosen===null){make(panel,'p','note','Click a node (or tab to it and press Enter) to see what acts on it and what it acts on. Drag to move, wheel to zoom. '+
'With a node chosen: p or ctrl-click pins it, x ablates it.');return}
const n=data.nodes[chosen],bar=document.createElement('div');make(panel,'h2','',n.label);
if(n.pos!==null)make(panel,'div','note',`position ${n.pos}, token ${shown(n.token)}`);
if(n.kind==='subcomponent'){const input=make(panel,'input');input.type='text';input.id='label';input.value=typedLabel(n);input.placeholder=plainText(n.auto||'a label of your own');input.setAttribute('aria-label','label');
input.addEventListener('input',()=>{typed.set(n.site,n.id,input.value);rename();if($('only').checked)drawPinned();pins_()});if(n.auto)make(panel,'div','note',n.auto)}
bar.className='bar';panel.append(bar);const b=make(bar,'button','',isPinned(chosen)?'unpin':'pin');b.id='pin';b.title='key: p';b.onclick=()=>pin(chosen);
if(n.kind!=='readout'&&n.pos!==null){const x=make(bar,'button','',removed.has(chosen)?'put back':'ablate');x.id='take';x.title='key: x';x.onclick=()=>take(chosen)}
const t=make(panel,'table');t.style.marginTop='.5rem';n.numbers.forEach(([name,v])=>{const r=make(t,'tr');make(r,'td','',name);make(r,'td','num',number(v))});
list('acted on by',incoming[chosen],0);list('acts on',outgoing[chosen],1);
const texts=data.contexts[n.context]||[];if(n.kind==='subcomponent'&&texts.length){make(panel,'h3','','where it is important');
texts.forEach(c=>{const d=make(panel,'div','text');c.tokens.forEach((token,i)=>{const s=make(d,'span','',token);
if(c.values){const v=c.values[i];if(v!==null&&v>.02)s.style.background=`rgb(var(--imp)/${(.9*v).toFixed(3)})`;if(v>.7)s.style.color='var(--on)';s.title='importance '+number(v)}})})}}

// What falls by ablating nodes, to first order through the edges of this graph: what is ablated falls whole, and a
// receiver by the sum over its senders of weight times the share by which the sender fell.
function predicted(off){const fallen=data.nodes.map(()=>0),left=incoming.map(e=>e.length),ready=left.map((n,i)=>n?-1:i).filter(i=>i>=0);
while(ready.length){const i=ready.pop(),a=data.nodes[i].act,share=off.has(i)?1:a?fallen[i]/a:0;
outgoing[i].forEach(e=>{const t=data.edges[e][1];fallen[t]+=share*(data.edges[e][2]||0);if(!--left[t])ready.push(t)})}return fallen}
function take(i){removed.has(i)?removed.delete(i):removed.add(i);paint();details();taken();remember()}
function taken(){const box=$('removed');box.textContent='';if(!removed.size)return;make(box,'h3','',`ablated (${removed.size})`);
[...removed].forEach(i=>{const n=data.nodes[i],l=make(box,'div','line');make(l,'span','',whole(n)+placed(n));const b=make(l,'button','','×');b.title='put back';b.onclick=()=>take(i)});
const fallen=predicted(removed),t=make(box,'table'),head=make(t,'tr');['readout','value','predicted change'].forEach((w,j)=>make(head,'th',j?'num':'',w));
data.nodes.forEach((n,i)=>{if(n.kind!=='readout')return;const r=make(t,'tr');make(r,'td','',shown(n.predicts===null?n.label:n.predicts));make(r,'td','num',number(n.act));make(r,'td','num',signed(-fallen[i]||0))});
make(box,'p','note','Predicted to first order through the edges of this graph'+(data.allEdges>data.edges.length?' that the page has':'')+', in units of the readout (logit minus mean logit for a token). '+
'This page holds no model, so it cannot measure. In Python:');
make(box,'pre','',`graph.removal(decomposition, tokens, ${JSON.stringify([...removed].map(i=>data.nodes[i].name))})`);
make(box,'p','note','gives the measured change beside the predicted one; in Jupyter, spd_lens.pictures.graph_view(graph, decomposition, tokens) does it for nodes that you tick.')}
